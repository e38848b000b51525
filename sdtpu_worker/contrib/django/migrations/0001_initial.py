"""The table of generated images."""

import django.utils.timezone
from django.db import migrations, models


class Migration(migrations.Migration):
    """Make the table."""

    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="GeneratedImage",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("task_id", models.CharField(editable=False, max_length=155, unique=True)),
                ("owner", models.CharField(blank=True, db_index=True, max_length=155)),
                ("prompt", models.TextField()),
                ("parameters", models.JSONField(default=dict, help_text="Of the request, and its options")),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("queued", "Queued"),
                            ("running", "Running"),
                            ("succeeded", "Succeeded"),
                            ("failed", "Failed"),
                            ("cancelled", "Cancelled"),
                        ],
                        db_index=True,
                        default="queued",
                        max_length=16,
                    ),
                ),
                ("image", models.ImageField(blank=True, max_length=255, upload_to="sdtpu/%Y/%m/%d/")),
                ("result", models.JSONField(blank=True, help_text="What the worker says of the image", null=True)),
                ("error", models.TextField(blank=True)),
                ("created_at", models.DateTimeField(db_index=True, default=django.utils.timezone.now)),
                ("ended_at", models.DateTimeField(blank=True, null=True)),
            ],
            options={
                "ordering": ("-created_at",),
            },
        ),
    ]
