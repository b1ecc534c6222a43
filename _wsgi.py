"""The WSGI entry: settings, then the service, then the app. Importing anything else starts nothing."""

import os

os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")  # as `supervisor` does, for whoever starts gunicorn by hand

from ml_backend import logs
from ml_backend.app import create_app
from ml_backend.service import Service
from ml_backend.settings import Settings

settings = Settings()
logs.hide(settings.secrets())
logs.configure(settings.log_level, as_json=settings.log_json)
service = Service(settings)
service.start()
app = create_app(service)
