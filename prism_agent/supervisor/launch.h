#ifndef PRISM_LAUNCH_H
#define PRISM_LAUNCH_H

int launch(int argc, char **argv);
int hold_namespace(int argc, char **argv);
int make_socket(int argc, char **argv);

#endif
