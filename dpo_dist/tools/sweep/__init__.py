"""Train each point of a grid."""
