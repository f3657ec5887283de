"""Pages of a run, a comparison and the doctor: single files that load nothing."""
