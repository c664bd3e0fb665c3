"""What a trained student is worth: translations and scores."""
