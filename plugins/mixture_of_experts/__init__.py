"""cpm.MixtureOfExperts: gated MLPs of which a router chooses a few for every token."""
