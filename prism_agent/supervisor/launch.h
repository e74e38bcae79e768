#ifndef PRISM_LAUNCH_H
#define PRISM_LAUNCH_H

int launch(int argc, char **argv);

#endif
