"""Where the page, the jobs API, the admin and the images are."""

from django.conf import settings
from django.conf.urls.static import static
from django.contrib import admin
from django.urls import include, path

from website import views

urlpatterns = [
    path("", views.page, name="page"),
    path("v1/", include("sdtpu_worker.contrib.django.urls")),
    path("admin/", admin.site.urls),
    *static(settings.MEDIA_URL, document_root=settings.MEDIA_ROOT),
]
