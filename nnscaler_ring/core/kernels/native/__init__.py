"""The C++ sources of the kernel `cpu_tiles`, how they are compiled, and how they are found."""
