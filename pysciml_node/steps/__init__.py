"""What any engine leaves behind and any engine needs: accepted steps, their record, the field."""
