"""Everything that is to be run once on a machine with a GPU."""
