"""The kinds of models: what a prompt becomes, what a slot keeps, what one prediction is, how latents become pixels."""
