"""Part: soft prompts, soft tokens, steering."""
