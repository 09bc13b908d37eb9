"""Our runtime beside the peers that a user would compare it with."""
