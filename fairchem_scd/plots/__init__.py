"""Pictures, one file a picture, all in one print style. Each module draws a figure; `style.save` writes it."""
