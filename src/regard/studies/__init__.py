"""One file a paper: what it claims, the figure it gives, the figure measured here."""
