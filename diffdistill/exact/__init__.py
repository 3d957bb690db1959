"""Teachers whose every quantity is known, and checks against them."""
