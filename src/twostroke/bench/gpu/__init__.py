"""The engine on a GPU beside the card's own ceilings, beside its peers, and beside the plan."""
