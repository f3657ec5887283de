"""Many processes: the world, ZeRO engines, checkpoints. The only room of Accelerate and DeepSpeed (law L6)."""
