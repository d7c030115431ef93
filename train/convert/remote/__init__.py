"""Files that travel with an export: nothing here imports this project, and nothing in this project imports them."""
