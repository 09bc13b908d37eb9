"""From the traced graph to a folder that one kind of runtime opens."""
