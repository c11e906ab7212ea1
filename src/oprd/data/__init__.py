"""From files to prompts, from prompts to padded tensors."""
