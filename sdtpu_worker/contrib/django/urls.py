"""The jobs API's URLs: `path("v1/", include("sdtpu_worker.contrib.django.urls"))`."""

from django.urls import path

from sdtpu_worker.contrib.django.views import serve

app_name = "sdtpu"
urlpatterns = [
    path("jobs", serve(""), name="jobs"),
    path("jobs/capabilities", serve("/capabilities"), name="job_capabilities"),
    path("jobs/batch", serve("/batch"), name="job_batch"),
    path("jobs/events", serve("/events"), name="all_events"),
    path("jobs/page", serve("/page"), name="to_page"),
    path("jobs/page/", serve("/page/"), name="page"),
    path("jobs/page/<str:name>", serve("/page/{name}"), name="page_file"),
    path("jobs/<str:job_id>", serve("/{job_id}"), name="job"),
    path("jobs/<str:job_id>/image", serve("/{job_id}/image"), name="job_image"),
    path("jobs/<str:job_id>/events", serve("/{job_id}/events"), name="job_events"),
]
