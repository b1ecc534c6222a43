"""The outside world: Label Studio's protocol, images, settings, the service, commands."""
