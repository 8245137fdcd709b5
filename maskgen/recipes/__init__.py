"""Recipes: `recipe` reads and checks them, `sections` holds the [train] section, each .toml file is a shipped one."""
