"""The papers' claims, tried on what we have: each module runs one trial and reads the claims off its table."""
