"""Many processes: world, ZeRO engines, checkpoints. The only room of Accelerate and DeepSpeed (law L6)."""
