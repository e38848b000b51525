"""The page: a form, and a card for each of the visitor's images."""

from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render

from sdtpu_worker import BrokerUnavailable, InvalidRequest
from sdtpu_worker.contrib.django.models import GeneratedImage
from sdtpu_worker.contrib.django.owners import owner_name


def page(request: HttpRequest) -> HttpResponse:
    owner, error, status = owner_name(request), "", 200
    if request.method == "POST":
        given = {name: request.POST[name] for name in ("prompt", "seed") if request.POST.get(name)}
        if (steps := request.POST.get("num_inference_steps", "")).isdigit():
            given["num_inference_steps"] = int(steps)
        try:
            GeneratedImage.objects.generate(**{"prompt": "", **given}, owner=owner)
            return redirect("page")
        except InvalidRequest as exc:
            error, status = str(exc), 400
        except BrokerUnavailable:
            error, status = "no image can be made now; try again later", 503
    images = GeneratedImage.objects.filter(owner=owner)[:12]
    return render(request, "index.html", {"images": images, "error": error}, status=status)
