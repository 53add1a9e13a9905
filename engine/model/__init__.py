"""The Instruct-ReID model: `engine.model.irm` is the whole of it on one screen."""
