#include "replay.h"

kernel_code replay;

void replay(const void *record, const struct team *team)
{
    const struct replay_record *a = record;
    if (team->thread == 0)
        for (int64_t number = 0; number < a->num_fields; number++) {
            const struct input_field *place = &a->fields[number];
            *place->field = a->inputs[place->input] + place->offset;
        }
    barrier(team);
    for (int64_t number = 0; number < a->num_calls; number++) {
        const struct recorded_call *call = &a->calls[number];
        if (call->takes_team)
            call->code(call->record, team);
        else
            call->code_by_numba(call->record);
        barrier(team);
    }
}
