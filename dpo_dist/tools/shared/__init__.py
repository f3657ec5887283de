"""What several tools use: findings, pages, tables, records, and responses of models with their judges."""
