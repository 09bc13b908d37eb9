"""The project's own measurements; nothing else imports this package."""
