"""What screening leaves behind: the schemas, the folder and its commit records, SQL."""
