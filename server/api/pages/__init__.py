"""Pages for people: ``/`` with what runs here, and the API's description by Swagger UI and ReDoc."""
