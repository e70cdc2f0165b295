"""Files of weights: those of the published programs, of timm, and of others."""
