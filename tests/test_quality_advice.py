"""What docs/quality.md advises is what the benchmark's files say, and these are of this protocol and these settings."""

import json

import pytest

from benchmarks.quality import contenders, document, in_place, protocol, report
from benchmarks.quality.workloads import WORKLOADS


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_results_were_written_by_this_protocol(name):
    file = json.loads((protocol.RESULTS / f"quality_{name}.json").read_text())
    said = json.loads(json.dumps({**WORKLOADS[name].protocol, **WORKLOADS[name].choices}))
    assert {key: file["protocol"][key] for key in said} == said
    assert file["settings"] == {x.title: x.settings for x in WORKLOADS[name].contenders}
    assert list(file["results"]) == [x.title for x in WORKLOADS[name].contenders]
    assert {key.split("|")[0] for key in file["runs"]} == file["results"].keys()


@pytest.fixture(scope="module")
def found():
    """The rows of every workload, by name."""
    return {name: {row.title: row for row in report.rows(name)} for name in (*document.DRAWN, *document.ABLATIONS)}


@pytest.fixture(scope="module")
def loss(found):
    """Their test losses, without those that diverge."""
    return {name: {x: row.of["loss"] for x, row in of.items() if row.is_stable} for name, of in found.items()}


FUSEDBUN, SM3, LION = contenders.FUSEDBUN, contenders.SM3, "DecoupledLionW"


@pytest.mark.parametrize(
    ("who", "behind"),
    [
        (contenders.OF_MEANS, {"fashion", document.LONGER}),
        (contenders.WITHOUT_MOMENTUM, {"digits_jax", "insteval", document.LONGER}),
    ],
)
def test_where_a_vector_per_axis_is_behind_adamw(found, who, behind):
    here = {name: found[name][who] for name in document.DRAWN if who in found[name]}
    assert {name for name, row in here.items() if document._behind(row, row.adamw) > 0} == behind
    assert max(row.of["state_bytes_per_parameter"] for row in here.values()) < 0.5


def test_what_the_longer_runs_on_text_say(loss):
    text = loss[document.LONGER]
    assert max(text[x] for x in (FUSEDBUN, contenders.INT4, "Fusedbun, lagged")) < text["AdamW"]
    assert text["AdamW"] < text["Adafactor"] < text[contenders.WITHOUT_MOMENTUM] < text[contenders.OF_MEANS]
    product, minimum = (text[f"SM3, mean and {x}, beta 0.95"] for x in ("product", "minimum"))
    assert text["AdamW"] < product < 1.01 * text["AdamW"] < minimum < min(text["SM3"], text[SM3])
    assert minimum < text[contenders.OF_MEANS]  # so momentum pays here


def test_how_learning_rates_compare_with_adamws(found):
    rates = {
        who: [found[name][who].relative_rate for name in document.DRAWN if who in found[name]]
        for who in (FUSEDBUN, "Fusedbun, default", contenders.WITHOUT_MOMENTUM, contenders.OF_MEANS)
    }
    middle = {who: document._middle(of) for who, of in rates.items()}
    assert set(rates[contenders.OF_MEANS]) == {0.25, 0.5}
    assert 1 / 25 < middle[FUSEDBUN] < 1 / 15  # about a twentieth
    assert 0.4 < middle[contenders.WITHOUT_MOMENTUM] < 0.7  # about a half
    assert 8 < middle[contenders.WITHOUT_MOMENTUM] / middle[FUSEDBUN] < 15  # about ten times
    assert middle["Fusedbun, default"] / middle[FUSEDBUN] > 200  # hundreds of times


def test_which_one_is_advised_for_what(found, loss):
    text, ratings = loss["shakespeare"], loss["insteval"]
    assert max(text[FUSEDBUN], text["Fusedbun, lagged"]) < text["AdamW"]
    assert text[contenders.INT4] < text["AdamW"]
    assert ratings["Fusedbun, default"] < ratings["SM3, sparse gradients"]
    assert loss["mails"][contenders.WITHOUT_MOMENTUM] < loss["mails"]["AdamW"]
    assert ratings["SM3, sparse gradients"] < min(ratings["SparseAdam, sparse gradients"], ratings["AdamW"])
    assert loss["insteval_ablation"]["Fusedbun without centralize"] < ratings["AdamW"] < ratings[FUSEDBUN]
    assert loss["digits"]["AdamW"] < loss["digits"][FUSEDBUN]
    assert loss["fashion"][FUSEDBUN] < loss["fashion"]["AdamW"]
    for name in (name for name in document.DRAWN if SM3 in loss[name]):
        assert loss[name]["SM3"] < loss[name][SM3]
    for name in ("digits_jax", "mnist_jax"):
        assert not found[name]["Fusedbun, lagged"].is_stable
        assert found[name]["Fusedbun, lagged, clip_rms=1"].is_stable


def test_what_is_said_of_signs(loss):
    from_scratch = [of for name, of in loss.items() if LION in of and name != "mails"]
    for of in from_scratch:
        assert of["AdamW"] < of["ScaledOptum"] < of[LION]
        assert list(of).index(LION) >= len(of) - 4
    assert loss["mails"][LION] < loss["mails"]["AdamW"]


def test_what_is_said_of_settings(loss):
    changes = {name: {x: of[x] / of[FUSEDBUN] - 1 for x in of} for name, of in loss.items() if FUSEDBUN in of}
    digits, fashion, text, ratings = (
        changes[f"{x}_ablation"] for x in ("digits", "fashion", "shakespeare", "insteval")
    )
    for of in (digits, fashion, text):
        assert of["Fusedbun without nesterov"] > 0
    for of in (digits, fashion, text, ratings):
        assert of["Fusedbun, full second moment"] > -0.011
        assert max(of[contenders.INT4], of["Fusedbun, momentum in 3 bits"]) < 0.01
    assert ratings["Fusedbun without centralize"] < -0.02
    assert text["Fusedbun, beta_decay=0.999"] > 0.01
    assert digits["Fusedbun without momentum"] < 0
    assert loss["digits_ablation"]["Fusedbun without momentum or centralize"] == min(loss["digits_ablation"].values())
    assert digits["Fusedbun, cautious"] > 0.5
    assert max(fashion["Fusedbun, cautious"], ratings["Fusedbun, cautious"]) < 0
    assert ratings["Fusedbun, combine minimum"] < 0 < digits["Fusedbun, combine minimum"]


@pytest.mark.parametrize("title", ["SM3, mean and minimum, beta 0.95", "SM3, mean and product, beta 0.95"])
def test_means_bring_sm3_level_with_adamw(loss, title):
    for name in ("digits", "fashion", "shakespeare"):
        here = loss[f"{name}_ablation"]
        assert here[title] < 1.01 * here["AdamW"] < 1.01 * here[SM3], name


@pytest.fixture(scope="module")
def in_its_place():
    """The change of everybody's loss against AdamW's and its standard error, by workload and share of the rate."""
    return {name: {share: in_place.changes(name, share) for share in in_place.AT} for name in in_place.NAMES}


OURS = [x.title for x in contenders.IN_PLACE if x.ours]
IN_BITS = ("FusedbunW", "FusedbunW, momentum float32", "FusedbunW, momentum int4")


@pytest.mark.parametrize("who", IN_BITS)
def test_in_adamws_place_at_its_rate(in_its_place, who):
    """At most 0.5% above it, in int4 1%, or within two standard errors."""
    for name, of in in_its_place.items():
        change, error = of["1"][who]
        assert change <= max(0.01 if "int4" in who else 0.005, 2 * error), name
    for name in ("fashion_in_place", "shakespeare_in_place"):
        for share in ("1", "2"):
            change, error = in_its_place[name][share][who]
            assert change < -2 * error
    for name in ("mnist_in_place", "insteval_in_place"):
        assert abs(in_its_place[name]["1"][who][0]) < max(0.001, 2 * in_its_place[name]["1"][who][1])


def test_the_digits_are_the_exception(in_its_place):
    digits = in_its_place["digits_in_place"]
    for who in OURS:
        change, error = digits["0.5"][who]
        assert change > 2 * error
    change, error = digits["2"]["FusedbunW, momentum int4"]
    assert change > 2 * error


def test_what_lagging_and_clipping_cost_in_place(in_its_place):
    for name, of in in_its_place.items():
        for who in ("FusedbunW, not lagged", "FusedbunW without clip"):
            (ours, error), (other, error_of_other) = of["1"]["FusedbunW"], of["1"][who]
            assert ours - other <= max(0.01, 2 * (error + error_of_other)), name
    ratings = in_its_place["insteval_in_place"]["2"]
    assert ratings["FusedbunW without clip"][0] > 0 > ratings["FusedbunW"][0]
    assert all(of["1"]["Adafactor"][0] > 0.05 for of in in_its_place.values())
