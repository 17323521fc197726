"""From scores to models: selection, training with TRL, evaluation, comparison."""
