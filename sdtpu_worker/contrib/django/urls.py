"""The jobs API's URLs: `path("v1/", include("sdtpu_worker.contrib.django.urls"))`."""

from django.urls import path

from sdtpu_worker.contrib.django.views import serve

app_name = "sdtpu"
urlpatterns = [
    path("jobs", serve(""), name="jobs"),
    path("jobs/<str:job_id>", serve("/{job_id}"), name="job"),
    path("jobs/<str:job_id>/image", serve("/{job_id}/image"), name="job_image"),
    path("jobs/<str:job_id>/events", serve("/{job_id}/events"), name="job_events"),
]
