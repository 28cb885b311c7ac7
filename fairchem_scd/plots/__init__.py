"""Pictures: one file a picture, all in one print style (`style`). Each draws a Figure and leaves writing it to `save`."""
