"""The operations in C: sources, their build, and the calls into the library."""
