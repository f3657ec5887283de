"""The processes of a run: they join, agree, watch each other and leave."""
