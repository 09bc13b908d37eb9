"""How fast, how large and how exact a bundle is on the machine at hand."""
