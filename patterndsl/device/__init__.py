"""How is work asked of a device? In launches that are repeated cheaply, and so that CUDA graphs can hold it."""
