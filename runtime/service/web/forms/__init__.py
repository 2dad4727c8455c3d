"""The objects of the API and its errors, as OpenAPI describes them."""
