"""To the Hub and back: results of a run, its model card, pushing, and conversion to other libraries' classes."""
