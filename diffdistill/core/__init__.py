"""Networks in the normal form x_t = cos(t) x0 + sin(t) eps, and pure functions on them. Torch alone."""
