"""What pages share: charts, responses, templates."""
