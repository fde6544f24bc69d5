"""The verb: input checked once, an engine chosen, failures explained."""
