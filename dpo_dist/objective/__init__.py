"""What is optimised and reported: pure tensor functions, no I/O and no collective calls."""
