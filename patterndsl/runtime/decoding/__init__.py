"""How does a decoder keep keys, and attend to what it kept?

`pages` decides on the host where each key is, `store` has the tensors, `gathered` attends by plain operations; the
kernel for a GPU is `runtime.kernels.decode`.
"""
