"""Archive to predictions: plan, stream through the model, publish."""
