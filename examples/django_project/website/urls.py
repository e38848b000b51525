"""Where the three views are."""

from django.urls import path

from website import views

urlpatterns = [
    path("images", views.create_image, name="create_image"),
    path("images/<str:task_id>", views.image_status, name="image_status"),
    path("images/<str:task_id>/image", views.image, name="image"),
]
