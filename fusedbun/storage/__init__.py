"""How numbers are stored between steps: codes, and the noise that rounds to them."""
