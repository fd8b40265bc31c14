"""Trainable attention layers, one mechanism a file: ``forward(x, *, context=None, pattern=None, state=None) -> y``.

``x`` is ``[batch, length, dim]``; what a layer cannot take it refuses by name. Layers on feature maps
(``[batch, dim, height, width]``) are `regard.layers.maps.MapLayer`.
"""
